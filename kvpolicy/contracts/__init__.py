"""What every plugin must hold, as a pytest suite over all that is installed.

    pytest --pyargs kvpolicy.contracts

Each policy and quantizer is tried with its default options and with variations of one option at a time. A
required option needs `examples` in its `Field`, from which the suite takes its value.
"""
