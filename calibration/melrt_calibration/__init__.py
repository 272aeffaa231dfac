"""INT8 calibration: measures of quality by which its choices are judged."""
