"""What an installation, a machine and its links lack: facts are gathered, then judged, one line each."""
