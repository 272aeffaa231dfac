#!/usr/bin/env bash
# Export a checkpoint as a verified bundle. Replace the demo voice with your own checkpoint file or folder.
set -euo pipefail
checkpoint=${1:-export/melrt_export/demo_voice}
melrt export "$checkpoint" -o demo/converted.melrt --force
melrt verify demo/converted.melrt --checkpoint "$checkpoint"
melrt info demo/converted.melrt
