# docs/config.toml as the conffile /etc/harmonylite/config.toml: nothing is replicated until db_path is set, and the
# server's streams have a folder that the package owns.
1a\
# Everybody on this machine may read this file: keep secrets in files of their own, or in systemd's credentials.\
# `harmonylite setup --db PATH` sets db_path and lets the service use the database. See harmonylite-config(5).
s|^# Only db_path must be set\.|# What must be set is db_path.|
s|^db_path = |# db_path = |
s|^# store_dir = ""|store_dir = "/var/lib/harmonylite"|
