"""The subcommands of `tierfs`, a module a group; each is imported only when it is used."""
