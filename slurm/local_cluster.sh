#!/usr/bin/env bash
# A real SLURM of two (or more) nodes on this one machine, to try jobs on.
#
#   local_cluster.sh start  [FOLDER] [--port P] [--nodes N] [--cpus N] [--memory MB]
#                                    [--accounting auto|yes|no] [--no-requeue]
#   local_cluster.sh stop   [FOLDER]
#   local_cluster.sh status [FOLDER]
#
# FOLDER (default: $XDG_RUNTIME_DIR or /tmp, then inherclip-slurm-UID) holds everything: configuration,
# keys, sockets, logs, spool, pids. Nothing outside of it is touched, no system service is used, and
# `stop` ends only the processes whose pids `start` saved. `source FOLDER/env.sh` points the SLURM
# commands of a shell at it. Ports P (slurmctld), P+1 (slurmdbd), P+2 ... (one slurmd each) are used on
# 127.0.0.1. Needs Debian's slurm-wlm and munge; slurmdbd with mariadb-server for accounting (sacct).
set -euo pipefail

die() { echo "local_cluster.sh: $*" >&2; exit 2; }
usage() { sed -n '2,15s/^# \{0,1\}//p' "$0"; }
# Debian keeps the daemons where an ordinary user's PATH does not look.
export PATH="$PATH:/usr/sbin:/sbin"

# ---- arguments ---------------------------------------------------------------------------------
action=${1:-}
[ $# -gt 0 ] && shift
case $action in
  start | stop | status) ;;
  -h | --help) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac
folder=""
port=17000 nodes=2 cpus=2 memory="" accounting=auto requeue=1
while [ $# -gt 0 ]; do
  case $1 in
    --port | --nodes | --cpus | --memory | --accounting)
      [ $# -ge 2 ] || die "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2 ;;
    --no-requeue) requeue=0; shift ;;
    -*) die "unknown option $1" ;;
    *) [ -z "$folder" ] || die "one folder only, got a second: $1"; folder=$1; shift ;;
  esac
done
for number in "$port" "$nodes" "$cpus" "${memory:-1}"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || die "'$number' is not a whole number above 0"
done
[[ $accounting =~ ^(auto|yes|no)$ ]] || die "--accounting is auto, yes or no, not '$accounting'"
folder=${folder:-${XDG_RUNTIME_DIR:-/tmp}/inherclip-slurm-$(id -u)}
[[ $folder =~ ^[A-Za-z0-9_./+-]+$ ]] || die "SLURM cannot use the folder name '$folder'; take plain letters"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
[ ${#folder} -le 80 ] || die "the folder name is too long for a Unix socket (80 characters at most): $folder"
user=$(id -un)
host=$(hostname)
host=${host%%.*} # SLURM knows machines by their short names

# ---- processes: started in the background, ended by their saved pid ------------------------------
launch() { # launch NAME COMMAND...: keep the pid with its start time, so that a reused pid is no victim
  local name=$1
  shift
  setsid "$@" >"$folder/log/$name.out" 2>&1 </dev/null &
  remember "$name" $!
}
started() { awk '{print $22}' "/proc/$1/stat" 2>/dev/null || true; }
remember() { echo "$2 $(started "$2")" >"$folder/pids/$1"; }
alive() { # alive NAME: is the process that we started still there?
  local pid since
  read -r pid since 2>/dev/null <"$folder/pids/$1" || return 1
  [ -n "$since" ] && [ "$(started "$pid")" = "$since" ]
}
pid_of() { cut -d' ' -f1 "$folder/pids/$1"; }
end() { # end NAME: TERM, and KILL after 15 seconds
  [ -e "$folder/pids/$1" ] || return 0
  if alive "$1"; then
    kill -TERM "$(pid_of "$1")" 2>/dev/null || true
    for _ in $(seq 150); do alive "$1" || break; sleep 0.1; done
    if alive "$1"; then kill -KILL "$(pid_of "$1")" 2>/dev/null || true; fi
  fi
  rm -f "$folder/pids/$1"
}
wait_for() { # wait_for SECONDS WHAT COMMAND...
  local seconds=$1 what=$2 deadline=$((SECONDS + $1))
  shift 2
  while [ $SECONDS -lt $deadline ]; do
    if "$@" >/dev/null 2>&1; then return 0; fi
    sleep 0.2
  done
  echo "local_cluster.sh: $what did not come up in $seconds s; its log:" >&2
  tail -n 15 "$folder/log/$what"* >&2 || true
  stop_all
  exit 1
}
stop_all() {
  local name
  if [ -d "$folder/pids" ]; then
    for name in "$folder"/pids/slurmd-*; do
      [ -e "$name" ] && end "$(basename "$name")"
    done
    for name in slurmctld slurmdbd mariadb munged; do end "$name"; done
  fi
}

# ---- configuration -------------------------------------------------------------------------------
write_configuration() {
  local with_accounting=$1 storage gather="jobacct_gather/linux"
  if [ "$with_accounting" = yes ]; then
    storage="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$folder/munge.socket"
    (umask 077 && cat >"$folder/slurmdbd.conf") <<DBD
AuthType=auth/munge
AuthInfo=$folder/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=$user
LogFile=$folder/log/slurmdbd.log
PidFile=$folder/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageLoc=slurm_acct
StorageUser=$user
DBD
  else
    storage="AccountingStorageType=accounting_storage/none"
  fi
  cat >"$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# cred_expire is also how long SLURM holds back a requeued job (120 s by default)
AuthInfo=socket=$folder/munge.socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=$gather
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=1000
MpiDefault=none
# a node that is set down by hand stays down until it is resumed
ReturnToService=1
JobRequeue=$requeue
KillWait=10
MinJobAge=3600
SchedulerParameters=bf_interval=3,sched_interval=3,batch_sched_delay=1
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmdParameters=config_overrides
$storage
NodeName=n[0-$((nodes - 1))] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 2))-$((port + 1 + nodes))] CPUs=$cpus Sockets=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$memory
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  # One node has a port without brackets.
  [ "$nodes" -gt 1 ] || sed -i -e 's/n\[0-0\]/n0/' -e "s/Port=\[\([0-9]*\)-[0-9]*\]/Port=\1/" "$folder/slurm.conf"
  cat >"$folder/env.sh" <<ENV
# source this file to use the local cluster in a shell
export SLURM_CONF=$folder/slurm.conf
ENV
}

# ---- accounting: a MariaDB of its own on a socket, without network -------------------------------
start_accounting() {
  if [ ! -d "$folder/mariadb/mysql" ]; then
    mariadb-install-db --no-defaults --user="$user" --datadir="$folder/mariadb" \
      --auth-root-authentication-method=normal --skip-test-db >"$folder/log/mariadb-install.out" 2>&1 ||
      die "mariadb-install-db failed; see $folder/log/mariadb-install.out"
  fi
  launch mariadb mariadbd --no-defaults --user="$user" --datadir="$folder/mariadb" \
    --socket="$folder/mariadb.socket" --skip-networking --pid-file="$folder/mariadb.pid" \
    --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900
  wait_for 60 mariadb mariadb --no-defaults --user=root --socket="$folder/mariadb.socket" -e 'SELECT 1'
  mariadb --no-defaults --user=root --socket="$folder/mariadb.socket" -e "
    CREATE DATABASE IF NOT EXISTS slurm_acct;
    CREATE USER IF NOT EXISTS '$user'@'localhost';
    GRANT ALL ON slurm_acct.* TO '$user'@'localhost';"
  # its MySQL library finds the socket by this variable
  MYSQL_UNIX_PORT=$folder/mariadb.socket SLURM_CONF=$folder/slurm.conf launch slurmdbd slurmdbd -D
  wait_for 60 slurmdbd timeout 5 env SLURM_CONF="$folder/slurm.conf" sacctmgr -n list cluster
  SLURM_CONF=$folder/slurm.conf timeout 20 sacctmgr -i add cluster local >"$folder/log/sacctmgr.out" 2>&1 || true
}

# ---- the three commands --------------------------------------------------------------------------
start() {
  local missing="" program with_accounting=$accounting
  for program in munged slurmctld slurmd sbatch srun; do
    command -v "$program" >/dev/null || missing+=" $program"
  done
  [ -z "$missing" ] || die "not installed:$missing (Debian: apt-get install slurm-wlm munge)"
  missing=""
  for program in slurmdbd mariadbd mariadb-install-db; do
    command -v "$program" >/dev/null || missing+=" $program"
  done
  if [ -n "$missing" ] && [ "$accounting" = yes ]; then
    die "accounting needs$missing (Debian: apt-get install slurmdbd mariadb-server)"
  fi
  if [ "$accounting" = auto ]; then
    with_accounting=yes
    [ -z "$missing" ] || { with_accounting=no; echo "no accounting: not installed:$missing"; }
  fi
  mkdir -p "$folder"/{log,pids,state}
  alive slurmctld && die "a cluster is running in $folder already; stop it first"
  stop_all # what a killed start left behind
  memory=${memory:-$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)}
  write_configuration "$with_accounting"

  [ -s "$folder/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
  launch munged munged --foreground --force --socket="$folder/munge.socket" \
    --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed"
  wait_for 10 munged test -S "$folder/munge.socket"
  [ "$with_accounting" = no ] || start_accounting
  export SLURM_CONF=$folder/slurm.conf
  launch slurmctld slurmctld -D
  for node in $(seq 0 $((nodes - 1))); do
    mkdir -p "$folder/spool-n$node"
    launch "slurmd-n$node" slurmd -D -N "n$node"
  done
  all_idle() { [ "$(timeout 5 sinfo -h -N -t idle -o %N | sort -u | wc -l)" = "$nodes" ]; }
  wait_for 60 slurmctld all_idle
  echo "$nodes nodes are idle, accounting: $with_accounting"
  echo "  source $folder/env.sh"
}

status() {
  local name
  [ -d "$folder/pids" ] || die "no cluster was started in $folder"
  for name in "$folder"/pids/*; do
    [ -e "$name" ] || die "no cluster is running in $folder"
    name=$(basename "$name")
    if alive "$name"; then echo "$name: pid $(pid_of "$name")"; else echo "$name: gone"; fi
  done
  SLURM_CONF=$folder/slurm.conf sinfo -N
}

# In braces, so that bash has read all of it before it starts: the file may change meanwhile.
{
  case $action in
    start) start ;;
    stop) stop_all; echo "stopped what was started in $folder" ;;
    status) status ;;
  esac
  exit
}
