"""INT8 calibration: which layers, with which scales, by measured quality and time."""
