#!/bin/bash
# Runs a command until it is done, where nothing else starts it again:  deploy/again.sh python cli.py sweep ablations
#
# Long verbs go on where they were. Exit code 0 is done, 2 a mistake that a new start does not mend, 130 Ctrl-C; after any
# other the command is started again, at most LA_AGAIN times (20), LA_AGAIN_SECONDS (30) apart.
set -uo pipefail
: "${LA_AGAIN:=20}" "${LA_AGAIN_SECONDS:=30}"

for ((start = 1; ; start++)); do
    "$@" && exit 0
    status=$?
    if [[ $status -eq 2 || $status -eq 130 || $start -gt $LA_AGAIN ]]; then
        exit "$status"
    fi
    echo "exit code $status at start $start; again in $LA_AGAIN_SECONDS s" >&2
    sleep "$LA_AGAIN_SECONDS"
done
