//! `podgate attach` and `detach`: the CNI plugin's work by hand.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;

use clap::Args;
use podgate_cni::protocol::{Addresses, AttachMode, AttachRequest, Bandwidth, PortMapping};
use podgate_cni::result::Attached;
use podgate_cni::{Attachment, CallError, Client, Request};
use serde_json::Value;

use super::{Exit, Format, put, table};

/// Which namespace.
#[derive(Debug, Args)]
pub struct Pod {
    /// The network namespace, as a path
    #[arg(long, value_name = "PATH")]
    pub netns: PathBuf,
    /// The interface to make in it
    #[arg(long, default_value = "eth0", value_name = "NAME", value_parser = interface_name)]
    pub ifname: String,
}

/// What is attached, and how.
#[derive(Debug, Args)]
pub struct AttachOptions {
    /// Which namespace
    #[command(flatten)]
    pub pod: Pod,
    /// The pod's name, for people: NAMESPACE/NAME
    #[arg(long, value_name = "NS/NAME")]
    pub name: Option<String>,
    /// Give it this address and no other; once for each family
    #[arg(long = "ip", value_name = "ADDRESS")]
    pub ips: Vec<IpAddr>,
    /// Take its addresses from this pool of podgate.yaml
    #[arg(long, value_name = "NAME")]
    pub pool: Option<String>,
    /// Lead a port of the node to it
    #[arg(long, value_name = "[IP:]PORT:POD-PORT[/tcp|udp]", value_parser = port_mapping)]
    pub publish: Vec<PortMapping>,
    /// Limit what it receives, in bits per second, as in 100M
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub ingress_rate: Option<u64>,
    /// Limit what it sends, in bits per second, as in 100M
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub egress_rate: Option<u64>,
    /// Do not masquerade what it sends out of the cluster
    #[arg(long)]
    pub no_masquerade: bool,
    /// The interface's MTU, in bytes [default: what the overlay takes]
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// The interface's Ethernet address
    #[arg(long, value_name = "MAC")]
    pub mac: Option<String>,
    /// By a veth, or by a TUN inside the namespace [default: what podgate.yaml says]
    #[arg(long, value_name = "veth|tun", value_parser = mode)]
    pub mode: Option<AttachMode>,
}

/// Linux `dev_valid_name`.
fn interface_name(text: &str) -> Result<String, String> {
    crate::config::check_device_name(text).map_err(|()| "an interface's name has 1 to 15 characters without `/`, `:` and blanks".to_owned())?;
    Ok(text.to_owned())
}

fn mode(text: &str) -> Result<AttachMode, String> {
    AttachMode::of(text).ok_or_else(|| "not a mode; write veth or tun".to_owned())
}

/// `8080:80`, `192.0.2.1:5353:53/udp`, `[2001:db8::1]:8080:80`.
fn port_mapping(text: &str) -> Result<PortMapping, String> {
    let mistake = || "not a mapping; write HOST-PORT:POD-PORT, as in 8080:80, 192.0.2.1:5353:53/udp or [2001:db8::1]:8080:80".to_owned();
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    if !matches!(protocol, "tcp" | "udp") {
        return Err(format!("`{protocol}` cannot be mapped; write tcp or udp"));
    }
    let (rest, container) = ports.rsplit_once(':').ok_or_else(mistake)?;
    let (host_ip, host) = match rest.rsplit_once(':') {
        Some((ip, host)) => (Some(ip.trim_matches(['[', ']']).parse::<IpAddr>().map_err(|_| mistake())?), host),
        None => (None, rest),
    };
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(mistake);
    Ok(PortMapping { host_port: port(host)?, container_port: port(container)?, protocol: protocol.to_owned(), host_ip })
}

/// Bits per second: `2500000`, `100M`, `1.5G`.
fn rate(text: &str) -> Result<u64, String> {
    let (number, factor) = match text.strip_suffix(['k', 'K', 'M', 'G']) {
        Some(number) => {
            (number, [('k', 1e3), ('K', 1e3), ('M', 1e6), ('G', 1e9)].into_iter().find(|(suffix, _)| text.ends_with(*suffix)).map_or(1.0, |f| f.1))
        }
        None => (text, 1.0),
    };
    let bits = number.parse::<f64>().ok().map(|number| number * factor).filter(|bits| (1e3..=1e12).contains(bits));
    bits.map(|bits| bits as u64).ok_or_else(|| "not a rate; write bits per second from 1k to 1000G, as in 100M".to_owned())
}

impl AttachOptions {
    fn request(&self) -> AttachRequest {
        let bandwidth =
            Bandwidth { ingress_rate: self.ingress_rate.unwrap_or(0), egress_rate: self.egress_rate.unwrap_or(0), ..Bandwidth::default() };
        AttachRequest {
            attachment: Attachment { name: self.name.clone(), ..attachment(&self.pod) },
            addresses: Addresses::Own { pool: self.pool.clone(), wanted: self.ips.clone() },
            masquerade: self.no_masquerade.then_some(false),
            mtu: self.mtu,
            mac: self.mac.clone(),
            mode: self.mode,
            port_mappings: self.publish.clone(),
            bandwidth: (bandwidth != Bandwidth::default()).then_some(bandwidth),
            ..AttachRequest::default()
        }
    }
}

/// Attaches, and prints the CNI result.
pub(super) fn attach(client: &Client, options: &AttachOptions) -> Result<Exit, CallError> {
    let path = options.pod.netns.display();
    let netns = match std::fs::File::open(&options.pod.netns) {
        Ok(file) => file,
        Err(e) => {
            eprintln!("podgate: the network namespace {path} cannot be opened: {e}. `ip netns add NAME` makes /run/netns/NAME");
            return Ok(Exit::Failed);
        }
    };
    let answer = client.call(&Request::Attach(Box::new(options.request())), &[netns.as_fd()])?;
    let attached: Attached = serde_json::from_value(answer).map_err(|source| CallError::Garbled { socket: client.socket().into(), source })?;
    Ok(put(&table::raw(&attached.to_json("1.1.0", &Value::Null), Format::Json)))
}

/// Detaches; that nothing was attached is no failure.
pub(super) fn detach(client: &Client, pod: &Pod) -> Result<Exit, CallError> {
    // With the namespace at hand, what does not go with the interface is taken out of it as well.
    let netns = std::fs::File::open(&pod.netns).ok();
    let fds: Vec<_> = netns.iter().map(AsFd::as_fd).collect();
    let result = client.call(&Request::Detach(attachment(pod)), &fds)?;
    if result["detached"] == false {
        eprintln!("podgate: nothing was attached as {} of {}; `podgate ipam -o wide` lists what is", pod.ifname, pod.netns.display());
    }
    Ok(Exit::Ok)
}

fn attachment(pod: &Pod) -> Attachment {
    // The daemon has another working directory.
    let netns = std::path::absolute(&pod.netns).unwrap_or_else(|_| pod.netns.clone());
    Attachment { sandbox: netns.to_string_lossy().into_owned(), ifname: pod.ifname.clone(), ..Attachment::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_are_checked_as_the_kernel_does() {
        for name in ["", "averyverylongname0", "a/b", "a b", "a:b", ".", ".."] {
            assert!(interface_name(name).is_err(), "{name:?}");
        }
        assert_eq!(interface_name("eth0").as_deref(), Ok("eth0"));
    }

    #[test]
    fn port_mappings_are_read_with_and_without_address_and_protocol() {
        let read = |text: &str| port_mapping(text).map(|m| (m.host_ip.map(|ip| ip.to_string()), m.host_port, m.container_port, m.protocol));
        assert_eq!(read("8080:80"), Ok((None, 8080, 80, "tcp".into())));
        assert_eq!(read("192.0.2.1:5353:53/udp"), Ok((Some("192.0.2.1".into()), 5353, 53, "udp".into())));
        assert_eq!(read("[2001:db8::1]:8080:80"), Ok((Some("2001:db8::1".into()), 8080, 80, "tcp".into())));
        for text in ["", "80", "8080:", ":80", "0:80", "8080:80/sctp", "host:8080:80", "8080:80:tcp", "70000:80"] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rates_are_bits_per_second_with_decimal_suffixes() {
        for (text, bits) in [("2500000", 2_500_000), ("100M", 100_000_000), ("1.5G", 1_500_000_000), ("64k", 64_000)] {
            assert_eq!(rate(text), Ok(bits), "{text}");
        }
        for text in ["", "M", "fast", "-5M", "10", "2000G", "nan", "1e400"] {
            assert!(rate(text).is_err(), "{text}");
        }
    }
}
