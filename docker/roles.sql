-- psql runs this once, as the superuser of a new server: three roles, of which harp-batch knows two.
--
--   postgres     the superuser; no part of harp-batch has its password
--   harp_app     owns the database `harp` and nothing else: migrate, submit, resume, nightly
--   harp_reader  may SELECT from what harp_app makes, now and later, and do nothing else: query, dashboards
--
-- Passwords come from the two libpq password files that APP_PGPASS and READER_PGPASS name: the fifth field of a line.
\set ON_ERROR_STOP on
\set app_password `cut -d: -f5 "$APP_PGPASS"`
\set reader_password `cut -d: -f5 "$READER_PGPASS"`

CREATE ROLE harp_app LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD :'app_password';
CREATE ROLE harp_reader LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD :'reader_password';
CREATE DATABASE harp OWNER harp_app;

-- Everybody may connect to a new database and make temporary tables in it, unless told otherwise.
REVOKE ALL ON DATABASE harp, postgres, template1 FROM PUBLIC;
GRANT CONNECT ON DATABASE harp TO harp_reader;

\connect harp
-- A migration that makes a view anew would lose a plain GRANT.
ALTER DEFAULT PRIVILEGES FOR ROLE harp_app IN SCHEMA public GRANT SELECT ON TABLES TO harp_reader;
