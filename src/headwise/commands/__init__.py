"""The commands of `headwise`, one file each; `headwise.cli` puts them together."""
