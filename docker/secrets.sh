#!/bin/sh
# Makes what docker-compose.yml needs and must not be in the repository: random secrets in docker/secrets, which their
# owner alone can read, and the owner's ids in .env. What is there already is kept, so it can be run again.
set -eu
cd "$(dirname "$0")/.."
umask 077

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

keep_or_write() {  # FILE TEXT
  [ -s "$1" ] || printf '%s\n' "$2" > "$1"
}

# Containers must not run as root; when root runs this, the secrets go to the image's own user.
uid=$(id -u) gid=$(id -g)
[ "$uid" != 0 ] || uid=10001 gid=10001

mkdir -p docker/secrets
keep_or_write docker/secrets/postgres_password "$(random)"
keep_or_write docker/secrets/ray_token "$(random)"
# libpq's format, host:port:database:user:password; any host, for the same files serve on 127.0.0.1 of this machine.
keep_or_write docker/secrets/app_pgpass "*:*:harp:harp_app:$(random)"
keep_or_write docker/secrets/reader_pgpass "*:*:harp:harp_reader:$(random)"
chmod 0700 docker/secrets
chmod 0600 docker/secrets/*
[ "$(id -u)" != 0 ] || chown -R "$uid:$gid" docker/secrets

touch .env
grep -q '^HARP_UID=' .env || printf 'HARP_UID=%s\nHARP_GID=%s\n' "$uid" "$gid" >> .env
echo "secrets are in docker/secrets, settings in .env; neither belongs in a repository"
