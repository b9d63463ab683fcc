#!/bin/busybox sh
# Process 1 of the Linux guest: file systems, a banner, and a shell on the serial console.
/bin/busybox mkdir -p /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=vt100
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
# `hostname=` on the command line gives another.
if [ "$(hostname)" = '(none)' ]; then
    hostname linux
fi
export PS1="$(hostname)# "
# The drivers of virtio, where there is a device for them.
if grep -qs 0x1af4 /sys/bus/pci/devices/*/vendor; then
    for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci \
        virtio-rng virtio_console failover net_failover virtio_net; do
        insmod "/lib/modules/$module.ko"
    done
fi
# The network, where there is a card: an address by DHCP, or from `tessera.ip=` on the command line
# where nobody answers. The shell does not wait for it.
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    ip link set eth0 up
    udhcpc -i eth0 -s /etc/udhcpc.sh -b -t 3 -T 2 -A 30 >/dev/null 2>&1 &
fi
echo
echo "Linux $(uname -r) is up after $(cut -d' ' -f1 /proc/uptime) s. Leave with poweroff."
# poweroff, reboot and halt signal process 1, which is this script.
trap 'poweroff -f' USR2
trap 'reboot -f' TERM
trap 'halt -f' USR1
# The shell needs the line as its controlling terminal for job control and Ctrl-C. It runs in the
# background because a shell takes its traps only while it waits.
cd /root
setsid cttyhack sh </dev/console >/dev/console 2>&1 &
wait $!
poweroff -f
