"""What runs in the pod: reads one run file, trains, leaves verified outputs. Started as `python -m hone_trainer`."""
