"""The only room that knows Ray: connect, place, call, watch, clean up; and the same calls in one process."""
