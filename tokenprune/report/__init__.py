"""Tables, pictures and HTML reports."""
