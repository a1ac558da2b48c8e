"""Mathematical answers: finding them in a response, reading them, deciding whether two mean the same. `decide` is the way in."""
