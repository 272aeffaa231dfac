#!/usr/bin/env bash
# Synthesize a folder of mels. Run it again after an interruption: finished utterances are kept, none is lost or repeated.
set -euo pipefail
mkdir -p mels
for name in one two three; do cp demo/mel.npy "mels/$name.npy"; done
melrt bulk demo/lj.melrt --input mels --output bulk-speech
ls bulk-speech
