//! Routing, sysctls and other network plugins on a node that runs.

use crate::{Fault, Try, Undo, Ward};

const fn sysctl(name: &'static str, make: for<'a> fn(&'a Ward<'a>) -> Try<Undo<'a>>, status: &'static str, words: &'static [&'static str]) -> Fault {
    Fault { name, make, check: "sysctls", status, words }
}

const fn plugin(name: &'static str, make: for<'a> fn(&'a Ward<'a>) -> Try<Undo<'a>>, words: &'static [&'static str]) -> Fault {
    Fault { name, make, check: "other-plugins", status: "warning", words }
}

/// Sets a sysctl, and to undo it sets it as it was found.
fn set<'a>(ward: &'a Ward<'a>, key: &'static str, value: &str) -> Try<Undo<'a>> {
    let path = std::path::Path::new("/proc/sys").join(key);
    let before = ward.node.machine().run(|| std::fs::read_to_string(&path))??;
    ward.node.machine().set_sysctl(key, value)?;
    Ok(Box::new(move || Ok(ward.node.machine().set_sysctl(key, before.trim_end())?)))
}

pub const FAULTS: &[Fault] = &[
    Fault {
        name: "a rule of somebody else's in front of the gateway's",
        make: |ward| ward.tools("ip rule add pref 50 lookup 4000", "ip rule del pref 50"),
        check: "early-rules",
        status: "warning",
        words: &["pref 50 lookup 4000", "above 101"],
    },
    Fault {
        name: "a route into the pod range",
        make: |ward| ward.tools("ip route add 10.244.77.0/24 dev eth0", "ip route del 10.244.77.0/24 dev eth0"),
        check: "ranges",
        status: "warning",
        words: &["10.244.0.0/16", "10.244.77.0/24 dev eth0"],
    },
    Fault {
        name: "a route of another table into the service range",
        make: |ward| {
            let undo = "ip rule del pref 5000 && ip route del 10.96.0.0/12 dev eth0 table 4000";
            ward.tools("ip rule add pref 5000 lookup 4000 && ip route add 10.96.0.0/12 dev eth0 table 4000", undo)
        },
        check: "ranges",
        status: "warning",
        words: &["service range 10.96.0.0/16", "10.96.0.0/12 dev eth0", "table 4000"],
    },
    Fault {
        name: "the configuration of another gateway than the one that is here",
        make: |ward| ward.configured(|text| text + "devices: {pods: pods2, host: other}\n"),
        check: "other-gateway",
        status: "failure",
        words: &["leads to `podgate`", "podgate cleanup"],
    },
    sysctl(
        "a strict reverse-path filter on the TUN",
        |ward| set(ward, "net/ipv4/conf/podgate/rp_filter", "1"),
        "failure",
        &["net.ipv4.conf.podgate.rp_filter is 1", "sysctl -w net.ipv4.conf.podgate.rp_filter=2"],
    ),
    sysctl(
        "no local sources on the TUN",
        |ward| set(ward, "net/ipv4/conf/podgate/accept_local", "0"),
        "failure",
        &["net.ipv4.conf.podgate.accept_local is 0"],
    ),
    sysctl(
        "no forwarding on the TUN",
        |ward| set(ward, "net/ipv4/conf/podgate/forwarding", "0"),
        "failure",
        &["net.ipv4.conf.podgate.forwarding is 0"],
    ),
    sysctl("no forwarding on the uplink", |ward| set(ward, "net/ipv4/conf/eth0/forwarding", "0"), "failure", &["net.ipv4.conf.eth0.forwarding is 0"]),
    sysctl("no forwarding of IPv6", |ward| set(ward, "net/ipv6/conf/all/forwarding", "0"), "failure", &["net.ipv6.conf.all.forwarding is 0"]),
    sysctl(
        "router advertisements that are ignored",
        |ward| set(ward, "net/ipv6/conf/eth0/accept_ra", "1"),
        "warning",
        &["net.ipv6.conf.eth0.accept_ra is 1", "accept_ra=2"],
    ),
    sysctl(
        "ports that are no longer reserved",
        |ward| set(ward, "net/ipv4/ip_local_reserved_ports", "30000-32767"),
        "warning",
        &["lacks 61000-65534"],
    ),
    plugin("flannel's bridge", |ward| ward.tools("ip link add cni0 type bridge", "ip link del cni0"), &["cni0", "ip link delete cni0"]),
    plugin("flannel's tunnel", |ward| ward.tools("ip link add flannel.1 type bridge", "ip link del flannel.1"), &["flannel.1", "(flannel)"]),
    plugin("Weave's bridge", |ward| ward.tools("ip link add weave type bridge", "ip link del weave"), &["weave", "Weave Net"]),
    plugin("Calico's tunnel", |ward| ward.tools("ip link add vxlan.calico type bridge", "ip link del vxlan.calico"), &["vxlan.calico", "Calico"]),
    plugin("Cilium's interface", |ward| ward.tools("ip link add cilium_host type bridge", "ip link del cilium_host"), &["cilium_host", "Cilium"]),
    Fault {
        name: "kube-proxy's VIPs on an interface",
        make: |ward| ward.tools("ip link add kube-ipvs0 type bridge && ip addr add 10.96.0.1/32 dev kube-ipvs0", "ip link del kube-ipvs0"),
        check: "other-plugins",
        status: "failure",
        words: &["IPVS", "kube-ipvs0 has 1 VIPs", "kube-proxy --cleanup"],
    },
];
