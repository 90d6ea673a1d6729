//! A node whose services are rules of the kernel: what kube-proxy would write, without kube-proxy, for pods that are routed to.
//!
//! The shape is upstream's: `pkg/proxy/nftables/proxier.go` (a verdict map from VIP, protocol and port to a chain for each service, one more
//! chain for each endpoint) and `pkg/proxy/iptables/proxier.go` (one list of all services, a chain for each, one for each endpoint). The
//! fixed chains that a ClusterIP's connections pass are there as well; those that concern node ports alone are not. Names are numbers
//! where upstream hashes, of the same length.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use podgate_runtime::netns::Netns;
use podgate_testbed::tool::Running;

use super::{Alive, Peer, routed_pod, router};
use crate::e2e::load::{ANSWER_PORT, SERVICE_PORT, STREAM_PORT, STREAM_VIP, vip};

/// Whose rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// `mode: nftables`.
    Nftables,
    /// `mode: iptables`, through the `nft` backend, as distributions have it.
    Iptables,
}

/// Services of one transaction of `nft`: it takes 2.5 GB for ten thousand at once.
const NFT_CHUNK: usize = 1_000;

/// Ten thousand services of 25 endpoints take `nft` minutes.
const PATIENCE: Duration = Duration::from_secs(1_200);

/// A service as the rules see it.
struct Service {
    name: String,
    vip: Ipv4Addr,
    /// Address and port.
    endpoints: Vec<(Ipv4Addr, u16)>,
}

/// A client's pod, `endpoints` pods that serve, and rules for `services` services of all of them.
pub fn kube_proxy(rules: Rules, services: u32, endpoints: u32, mtu: u32) -> anyhow::Result<Peer> {
    let (gateway, netlink) = router()?;
    let address = |number: u32| Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 244, 1, 2)) + number);
    let from = routed_pod(&netlink, "client", address(0), mtu)?;
    let mut to = Vec::new();
    for number in 1..=endpoints {
        to.push((routed_pod(&netlink, &format!("server{number}"), address(number), mtu)?, address(number).into()));
    }
    let all: Vec<(Ipv4Addr, u16)> = (1..=endpoints).map(|number| (address(number), ANSWER_PORT)).collect();
    let stream = Service { name: "stream".into(), vip: STREAM_VIP, endpoints: vec![(address(1), STREAM_PORT)] };
    let others = (0..services).map(|number| Service { name: format!("service-{number}"), vip: vip(number), endpoints: all.clone() });
    let services_declared: Vec<Service> = [stream].into_iter().chain(others).collect();
    match rules {
        Rules::Nftables => {
            feed(&gateway, "nft", &["-f", "-"], NFT_BASE)?;
            let mut number = 0;
            for chunk in services_declared.chunks(NFT_CHUNK) {
                feed(&gateway, "nft", &["-f", "-"], &nftables(chunk, number))?;
                number += chunk.len();
            }
        }
        // Without --noflush, which kube-proxy needs and a fresh namespace does not: with it 25,000 chains take minutes instead of seconds.
        Rules::Iptables => feed(&gateway, "iptables-nft-restore", &[], &iptables(&services_declared))?,
    }
    let alive = Alive { _gateway: Some(gateway), ..Alive::default() };
    Ok(Peer { from: Some(from), to, services: Some(services), _alive: alive })
}

/// Runs `program` with `input` on the node.
fn feed(node: &Netns, program: &str, arguments: &[&str], input: &str) -> anyhow::Result<()> {
    let mut command = Command::new(program);
    command.args(arguments);
    let running = node.run(|| Running::start(command, input.as_bytes()))??;
    running.end(PATIENCE)?.success()?;
    Ok(())
}

const NFT_BASE: &str = "\
add table ip kube-proxy
add set ip kube-proxy cluster-ips { type ipv4_addr ; }
add set ip kube-proxy nodeport-ips { type ipv4_addr ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy firewall-check
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy masquerading
add chain ip kube-proxy services
add chain ip kube-proxy service-endpoints-check
add chain ip kube-proxy filter-prerouting-pre-dnat { type filter hook prerouting priority -110 ; }
add chain ip kube-proxy filter-forward { type filter hook forward priority 0 ; }
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject
add rule ip kube-proxy cluster-ips-check ip daddr { 10.96.0.0/16 } drop
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy nat-prerouting jump services
";

// Writing to a string cannot fail; so below as well.
fn nftables(services: &[Service], first: usize) -> String {
    let mut text = String::new();
    for (number, Service { name, vip, endpoints }) in services.iter().enumerate().map(|(at, service)| (first + at, service)) {
        let chain = format!("service-{number:08X}-bench/{name}/tcp/p");
        let mut choices = Vec::new();
        for (at, (address, port)) in endpoints.iter().enumerate() {
            let endpoint = format!("endpoint-{number:05X}{at:03X}-bench/{name}/tcp/p__{address}/{port}");
            let _ = writeln!(text, "add chain ip kube-proxy {endpoint}");
            let _ = writeln!(text, "add rule ip kube-proxy {endpoint} ip saddr {address} jump mark-for-masquerade");
            let _ = writeln!(text, "add rule ip kube-proxy {endpoint} meta l4proto tcp dnat to {address}:{port}");
            choices.push(format!("{at} : goto {endpoint}"));
        }
        let (count, choices) = (choices.len(), choices.join(" , "));
        let _ = writeln!(text, "add chain ip kube-proxy {chain}");
        let _ = writeln!(text, "add rule ip kube-proxy {chain} ip daddr {vip} ip saddr != 10.244.0.0/16 jump mark-for-masquerade");
        let _ = writeln!(text, "add rule ip kube-proxy {chain} numgen random mod {count} vmap {{ {choices} }}");
        let _ = writeln!(text, "add element ip kube-proxy cluster-ips {{ {vip} }}");
        let _ = writeln!(text, "add element ip kube-proxy service-ips {{ {vip} . tcp . {SERVICE_PORT} : goto {chain} }}");
    }
    text
}

fn iptables(services: &[Service]) -> String {
    let mut text = String::from(
        "*filter\n:KUBE-SERVICES - [0:0]\n:KUBE-EXTERNAL-SERVICES - [0:0]\n:KUBE-FORWARD - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n\
         -A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n-A FORWARD -j KUBE-FORWARD\n\
         -A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
         -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n\
         *nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n",
    );
    let service_chain = |number: usize| format!("KUBE-SVC-{number:016X}");
    let endpoint_chain = |number: usize, at: usize| format!("KUBE-SEP-{number:012X}{at:04X}");
    for (number, service) in services.iter().enumerate() {
        let _ = writeln!(text, ":{} - [0:0]", service_chain(number));
        for at in 0..service.endpoints.len() {
            let _ = writeln!(text, ":{} - [0:0]", endpoint_chain(number, at));
        }
    }
    text.push_str(
        "-A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n-A POSTROUTING -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n-A KUBE-POSTROUTING -j MASQUERADE --random-fully\n",
    );
    for (number, Service { name, vip, endpoints }) in services.iter().enumerate() {
        let chain = service_chain(number);
        let to_vip = format!("-m comment --comment \"bench/{name}:p cluster IP\" -m tcp -p tcp -d {vip} --dport {SERVICE_PORT}");
        let _ = writeln!(text, "-A KUBE-SERVICES {to_vip} -j {chain}");
        let _ = writeln!(text, "-A {chain} {to_vip} ! -s 10.244.0.0/16 -j KUBE-MARK-MASQ");
        for (at, (address, port)) in endpoints.iter().enumerate() {
            let endpoint = endpoint_chain(number, at);
            let left = endpoints.len() - at;
            // Each of those that are left with the same probability; the last takes the rest.
            let chance = if left > 1 { format!("-m statistic --mode random --probability {:.10} ", 1.0 / left as f64) } else { String::new() };
            let _ = writeln!(text, "-A {chain} -m comment --comment \"bench/{name}:p -> {address}:{port}\" {chance}-j {endpoint}");
            let _ = writeln!(text, "-A {endpoint} -m comment --comment bench/{name}:p -s {address} -j KUBE-MARK-MASQ");
            let _ = writeln!(text, "-A {endpoint} -m comment --comment bench/{name}:p -m tcp -p tcp -j DNAT --to-destination {address}:{port}");
        }
    }
    text.push_str("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> [Service; 2] {
        let endpoints = vec![(Ipv4Addr::new(10, 244, 1, 3), 7001), (Ipv4Addr::new(10, 244, 1, 4), 7001)];
        [0, 1].map(|number| Service { name: format!("s{number}"), vip: vip(number), endpoints: endpoints.clone() })
    }

    #[test]
    fn each_endpoint_of_each_service_has_a_chain_and_each_service_an_element() {
        let text = nftables(&two(), 0);
        assert_eq!(text.matches("add chain ip kube-proxy endpoint-").count(), 4);
        assert_eq!(text.matches("add element ip kube-proxy service-ips").count(), 2);
        assert!(text.contains("numgen random mod 2 vmap { 0 : goto endpoint-00000000-bench/s0/tcp/p__10.244.1.3/7001 , 1 : goto"), "{text}");
    }

    #[test]
    fn the_last_endpoint_takes_what_the_others_left() {
        let text = iptables(&two());
        assert_eq!(text.matches("--probability 0.5000000000").count(), 2);
        assert_eq!(text.matches("-j DNAT").count(), 4);
        assert!(text.contains(
            "-A KUBE-SERVICES -m comment --comment \"bench/s1:p cluster IP\" -m tcp -p tcp -d 10.96.1.2 --dport 80 -j KUBE-SVC-0000000000000001"
        ));
    }
}
