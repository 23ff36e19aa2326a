"""One file a command. Each imports the stages it needs when it runs, so that help is instant."""
