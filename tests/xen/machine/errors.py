"""What can keep the machine from running; the tests turn it into a skip or a failure."""


class Unavailable(Exception):
    """This host cannot run the Xen tests; the text says what is missing."""


class MachineFailed(Exception):
    """The machine was started and did not do its work; the text ends with its console."""
