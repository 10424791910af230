"""Pictures, reports and the timing they show."""
