"""What everything stands on: settings, exits, whole files, model folders, processes, device, statistics."""
