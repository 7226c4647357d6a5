"""What every room stands on: config, files, the run folder, progress, metrics, devices."""
