# Sourced by ~/.bashrc on the machines of local.yaml, because Ray runs all its commands in login shells.
export PATH=$HOME/scaling-env/bin:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
