import os, json, sys, subprocess
sys.stdout = open("/dev/hvc0", "w", buffering=1)
sys.stderr = sys.stdout
os.dup2(sys.stdout.fileno(), 1); os.dup2(sys.stdout.fileno(), 2)
print("hello", sys.version, os.listdir("/dev/xen"))
try:
    import ctypes
    x = ctypes.CDLL("libxenctrl.so.4.17", use_errno=True)
    print(x)
except Exception as e: print(repr(e))
print('XEN-RESULT ' + json.dumps({"name": "hello"}))
print("XEN-END")
