"""What a measurement needs: the environment record, the GPU meter, progress."""
