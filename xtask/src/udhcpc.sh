#!/bin/busybox sh
# What udhcpc calls when something becomes of the lease of $interface: it sets the address, the
# route and the name servers, and tells the console.
say() {
    printf '\n%s: %s\n' "$interface" "$*" >/dev/console
}
case $1 in
deconfig)
    ip addr flush dev "$interface"
    ip link set "$interface" up
    ;;
bound | renew)
    rm -f /run/no-lease
    if [ "$1" = bound ]; then
        ip addr flush dev "$interface"
    fi
    ip addr replace "$ip/${mask:-24}" broadcast + dev "$interface"
    if [ -n "$router" ]; then
        ip route replace default via "${router%% *}" dev "$interface"
    fi
    for server in $dns; do
        echo "nameserver $server"
    done >/etc/resolv.conf
    if [ "$1" = bound ]; then
        say "$ip/${mask:-24} by DHCP${router:+, gateway ${router%% *}}"
    fi
    ;;
leasefail)
    # It goes on asking, and this comes again each time.
    [ -e /run/no-lease ] && exit
    : >/run/no-lease
    own=$(sed -n 's/.*\btessera\.ip=\([^ ]*\).*/\1/p' /proc/cmdline)
    if [ -z "$own" ]; then
        say "no DHCP server answers, and there is no tessera.ip= on the command line"
    elif ip addr replace "$own" broadcast + dev "$interface"; then
        say "$own by the command line"
    else
        say "tessera.ip=$own is no address"
    fi
    ;;
esac
