"""INT8 calibration: choose layers and scales by measured quality and measured time."""
