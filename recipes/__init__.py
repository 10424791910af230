"""The shipped recipes, one YAML file each; installed as `tokenprune.recipes`."""
