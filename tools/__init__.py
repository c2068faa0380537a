"""What only maintainers run, and no wheel holds: compile gates, machine code checks, generated pages."""
