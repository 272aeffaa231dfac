"""Tools that every benchmark uses: environment record, GPU meter, progress."""
