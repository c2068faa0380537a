"""What bench and tune measure with: cases, models, one clock, memory, roofs, telemetry, workers, provenance."""
