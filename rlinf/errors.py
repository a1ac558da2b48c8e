"""The errors that any package may raise, and that the command line turns into exit codes."""


class UserError(Exception):
    """The user's mistake (configuration, data, model folder, environment): shown as one message, exit code 2.

    The message names the file, line or key, says what is wrong, and says what to do next.
    """


class RunFailed(Exception):
    """A run ended for a reason outside the user's input (a worker died, a check failed): one message, exit code 1."""


class Hang(RunFailed):
    """A phase took longer than its budget, and nothing is known to have died. Restarted, the run may well go on."""


class WorkerLost(RunFailed):
    """A worker died that may be replaced (WorkerGroup.deaths_allowed). Its calls must be repeated when it has been replaced."""
