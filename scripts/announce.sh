#!/bin/sh
# Waits until the server at $1 answers, then prints where it is and a line to try for model $2. Ends with process $3.
parent=$3
while kill -0 "$parent" 2>/dev/null; do
  if curl -sf -o /dev/null "$1/health"; then
    cat <<TEXT

  Serving at $1  (a chat page for your browser)

  curl $1/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "$2", "messages": [{"role": "user", "content": "What is the capital of France?"}]}'

TEXT
    exit 0
  fi
  sleep 0.5
done
