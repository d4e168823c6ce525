#!/bin/busybox sh
# The first process of a test guest: loads the drivers, then serves commands on a virtio port.
#
# A line "ID SECONDS BASE64" runs that shell command with a time limit, in the background; the
# answer is a line "REPLY ID STATUS LENGTH" and LENGTH bytes of output. HELLO says "I have booted".

export PATH=/usr/sbin:/usr/bin:/bin:/sbin HOME=/
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
echo 4 >/proc/sys/kernel/printk

while read -r module; do
    modprobe "$module" || echo "init: no module $module"
done </etc/modules

port=
while [ -z "$port" ]; do
    for folder in /sys/class/virtio-ports/*; do
        [ "$(cat "$folder/name" 2>/dev/null)" = agent ] && port=/dev/${folder##*/}
    done
    [ -n "$port" ] || usleep 20000
done
until [ -c "$port" ]; do usleep 20000; done
exec 3<>"$port"

answer() {
    timeout -s KILL "$2" sh -c "$(echo "$3" | base64 -d)" >"/tmp/agent.$1" 2>&1 </dev/null 3>&-
    status=$?
    until mkdir /tmp/agent.lock 2>/dev/null; do usleep 5000; done
    length=$(stat -c %s "/tmp/agent.$1")
    echo "REPLY $1 $status $length" >&3
    head -c "$length" "/tmp/agent.$1" >&3
    rmdir /tmp/agent.lock
    rm -f "/tmp/agent.$1"
}

echo HELLO >&3
while :; do
    while read -r id limit command <&3; do
        answer "$id" "$limit" "$command" &
    done
    # Nobody listens at the other end (a migration has just ended, say): wait for somebody.
    usleep 50000
done
