"""Result files, comparison, plots and the HTML report."""
