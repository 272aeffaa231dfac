"""Result files, their comparison, plots and the HTML report."""
