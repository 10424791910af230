"""What the library knows about hosts: facts, adapters, inputs, and how to build them."""
