"""Where nothing but torch is installed, each plug-in says what to install, and the rest works."""

import importlib

import p4flows

assert {"MergeScheduler", "P4Inv", "report"} <= set(p4flows.__all__)
assert all(hasattr(p4flows, name) for name in p4flows.__all__)

for plug_in in ("nflows", "bgflow", "normflows", "zuko", "lightning", "molecules"):
    try:
        importlib.import_module(f"p4flows.{plug_in}")
    except ImportError as error:
        message = str(error)
    else:
        message = "it was imported, although what it needs is not there"
    print(message)
    assert message.startswith(f"p4flows.{plug_in} needs "), message
    assert f"pip install 'p4flows[{plug_in}]'" in message, message
