"""What stands in the way of a cluster."""


class CannotStart(Exception):
    """This machine cannot have the cluster as it is; the text says what to do."""
