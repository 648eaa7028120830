#!/bin/sh
# Prints the extras to install: by the NVIDIA driver or ROCm that is found, and what the demo needs.
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1)
case "$driver" in
  "" | *[!0-9]*) [ -e /opt/rocm ] && echo "demo,rocm" || echo "demo" ;;
  *) if [ "$driver" -ge 580 ]; then echo "demo,cuda13"; else echo "demo,cuda12"; fi ;;
esac
