"""Architecture adapters: facts about hosts, a file a family; installed as `tokenprune.adapters`."""

if __name__ != "tokenprune.adapters":
    raise ImportError(
        f"import tokenprune.adapters, not {__name__}: this would be a second copy of the same "
        "files, with a registry of its own."
    )
