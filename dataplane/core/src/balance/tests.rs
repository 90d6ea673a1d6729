//! Distribution, disruption, Maglev against the paper's own pseudocode, and the counting of loads.

use proptest::prelude::*;

use super::*;
use crate::addr::protocol;
use crate::flow::{Cursor, Kind, NewFlow, Now, Opener, OwnedFlows};
use crate::service::Place;
use crate::verdict::WorkerId;

const CONNECTIONS: u32 = 10_000;
const NO_LOADS: Loads<'static> = Loads(&[]);

fn endpoints(count: u32) -> Vec<Backend> {
    (0..count).map(|n| Backend { addr: Addr::from_v4((0x0af4_0102 + n * 3).to_be_bytes()), port: 8080, place: Place::RemotePod }).collect()
}

/// Connections as they come in life: one client's ports in order, clients in order, and all over a v6 prefix.
fn connections() -> Vec<(&'static str, Vec<Tuple>)> {
    let vip = Addr::from_v4([10, 96, 0, 10]);
    let v4 = |client: u32, port: u16| Tuple {
        src: Addr::from_v4((0xc633_6400 + client).to_be_bytes()),
        dst: vip,
        src_port: port,
        dst_port: 80,
        protocol: protocol::TCP,
    };
    let v6 = |n: u32| Tuple { src: Addr(0x2001_0db8 << 96 | u128::from(n) << 20), dst: Addr(0xfd00 << 112 | 10), ..v4(0, (n * 7) as u16) };
    vec![
        ("one client, port by port", (0..CONNECTIONS).map(|n| v4(7, 32_768 + n as u16)).collect()),
        ("client by client, one port", (0..CONNECTIONS).map(|n| v4(n, 40_000)).collect()),
        ("clients of a prefix", (0..CONNECTIONS).map(v6).collect()),
    ]
}

/// Fails if `counts` deviate from shares in proportion to `weights` more than chance does once in a million times (Pearson's chi-square,
/// with Wilson and Hilferty's approximation of its quantile).
#[track_caller]
fn assert_fits(counts: &[u32], weights: &[u16], what: &str) {
    let (total, weight) = (counts.iter().sum::<u32>(), weights.iter().map(|w| f64::from(*w)).sum::<f64>());
    let expected = weights.iter().map(|w| f64::from(total) * f64::from(*w) / weight);
    let square: f64 = counts.iter().zip(expected).map(|(count, expected)| (f64::from(*count) - expected).powi(2) / expected).sum();
    let freedom = (counts.len() - 1) as f64;
    // The standard normal's quantile at 1 - 1e-6.
    const Z: f64 = 4.753;
    let bound = freedom * (1.0 - 2.0 / (9.0 * freedom) + Z * (2.0 / (9.0 * freedom)).sqrt()).powi(3);
    assert!(square < bound, "{what}: chi-square {square:.1}, once in a million times above {bound:.1}: {counts:?}");
}

fn count(pick: &Pick, endpoints: &[Backend], hashes: impl IntoIterator<Item = u64>) -> Vec<u32> {
    let mut counts = vec![0; endpoints.len()];
    for hash in hashes {
        let chosen = pick.choose(endpoints, hash, NO_LOADS).expect("there are endpoints");
        counts[endpoints.iter().position(|endpoint| endpoint == chosen).unwrap()] += 1;
    }
    counts
}

fn weights_of(count: u32) -> Vec<u16> {
    (0..count).map(|n| (n % 4 + 1) as u16).collect()
}

fn policies(endpoints: &[Backend], weights: &[u16]) -> Vec<Pick> {
    let alike = vec![1; endpoints.len()];
    if weights == alike {
        return vec![Pick::Even, Pick::Maglev(Maglev::new(endpoints, weights).into()), Pick::LeastLoaded(None)];
    }
    let table = Arc::new(Weights::new(weights).unwrap());
    vec![Pick::Weighted(table), Pick::Maglev(Maglev::new(endpoints, weights).into())]
}

#[test]
fn every_policy_spreads_connections_and_clients_evenly_or_by_weight() {
    for n in [3, 7, 100] {
        let endpoints = endpoints(n);
        for weights in [vec![1; n as usize], weights_of(n)] {
            for pick in policies(&endpoints, &weights) {
                for (what, tuples) in connections() {
                    let what = format!("{} over {n}: {what}", pick.name());
                    assert_fits(&count(&pick, &endpoints, tuples.iter().map(of_connection)), &weights, &what);
                    if what.ends_with("port by port") {
                        continue;
                    }
                    assert_fits(&count(&pick, &endpoints, tuples.iter().map(|t| of_client(t.src, 7))), &weights, &format!("{what}, sticking"));
                }
            }
        }
    }
}

/// How many of the connections whose endpoint is in both lists change it from one to the other.
fn moved(before: &[Backend], after: &[Backend], of: impl Fn(&[Backend]) -> Pick) -> f64 {
    let (first, second) = (of(before), of(after));
    let (mut stay, mut moved) = (0u32, 0u32);
    for (_, tuples) in connections() {
        for hash in tuples.iter().map(of_connection) {
            let chosen = first.choose(before, hash, NO_LOADS).unwrap();
            if after.contains(chosen) {
                match second.choose(after, hash, NO_LOADS).unwrap() == chosen {
                    true => stay += 1,
                    false => moved += 1,
                }
            }
        }
    }
    f64::from(moved) / f64::from(moved + stay)
}

#[test]
fn one_backend_of_a_hundred_that_comes_or_goes_moves_few_of_the_others_clients_under_maglev() {
    let maglev = |list: &[Backend]| Pick::Maglev(Maglev::new(list, &[]).into());
    let hundred = endpoints(100);
    for gone in [0, 37, 99] {
        let mut rest = hundred.clone();
        rest.remove(gone);
        let (away, back) = (moved(&hundred, &rest, maglev), moved(&rest, &hundred, maglev));
        assert!(away < 0.03, "{away} of the others' clients moved when {gone} left");
        assert!(back < 0.03, "{back} of the clients moved to another than the newcomer {gone}");
        // What it is there for: a plain list moves nearly everybody.
        assert!(moved(&hundred, &rest, |_| Pick::Even) > away * 5.0);
    }
}

#[test]
fn no_two_endpoints_differ_much_in_maglevs_table() {
    for n in [1u32, 3, 10, 11, 100, 163, 164, 1_000] {
        let maglev = Maglev::new(&endpoints(n), &[]);
        let mut counts = vec![0u32; n as usize];
        maglev.places.iter().for_each(|endpoint| counts[usize::from(*endpoint)] += 1);
        let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
        assert!(most - least <= 1, "{n}: {least} to {most}");
    }
}

/// The paper's pseudocode (§3.4, pseudocode 1), with the permutations written out.
fn maglev_of_the_paper(endpoints: &[Backend], size: usize) -> Vec<u16> {
    let permutation: Vec<Vec<usize>> = endpoints
        .iter()
        .map(|endpoint| {
            let name = backend_hash(endpoint.addr, endpoint.port);
            let (offset, skip) = (scale(finalize(name ^ 1), size), scale(finalize(name ^ 2), size - 1) + 1);
            (0..size).map(|j| (offset + j * skip) % size).collect()
        })
        .collect();
    let mut next = vec![0; endpoints.len()];
    let mut entry = vec![None; size];
    let mut n = 0;
    loop {
        for i in 0..endpoints.len() {
            let mut c = permutation[i][next[i]];
            while entry[c].is_some() {
                next[i] += 1;
                c = permutation[i][next[i]];
            }
            entry[c] = Some(i as u16);
            next[i] += 1;
            n += 1;
            if n == size {
                return entry.into_iter().flatten().collect();
            }
        }
    }
}

#[test]
fn maglevs_table_is_the_papers() {
    for n in [1, 2, 3, 10, 25] {
        let endpoints = endpoints(n);
        let maglev = Maglev::new(&endpoints, &vec![5; n as usize]);
        assert_eq!(*maglev.places, maglev_of_the_paper(&endpoints, maglev.size()), "{n}");
    }
}

#[test]
fn the_sizes_of_maglevs_tables_are_primes() {
    for (_, size) in MAGLEV_SIZES {
        assert!((2..).take_while(|n| n * n <= size).all(|n| size % n != 0), "{size}");
    }
}

proptest! {
    #[test]
    fn a_ticket_of_the_weights_belongs_to_the_endpoint_that_a_walk_finds(weights in prop::collection::vec(1u16..=100, 2..40), hash: u64) {
        let Some(table) = Weights::new(&weights) else {
            prop_assert!(weights.iter().all(|weight| *weight == weights[0]));
            return Ok(());
        };
        let total: u64 = weights.iter().map(|w| u64::from(*w)).sum();
        let mut ticket = ((hash >> 32) * total) >> 32;
        let walked = weights.iter().position(|weight| {
            let here = ticket < u64::from(*weight);
            ticket = ticket.saturating_sub(u64::from(*weight));
            here
        });
        prop_assert_eq!(Some(table.at(hash)), walked);
        prop_assert!((0..weights.len()).all(|at| table.of(at) == u32::from(weights[at])));
    }

    #[test]
    fn every_policy_chooses_within_its_list_whatever_the_hash(count in 1u32..200, hash: u64) {
        let endpoints = endpoints(count);
        for weights in [vec![1; count as usize], weights_of(count)] {
            for pick in policies(&endpoints, &weights) {
                prop_assert!(pick.choose(&endpoints, hash, NO_LOADS).is_some());
            }
        }
    }
}

#[test]
fn nothing_is_chosen_from_an_empty_list() {
    for pick in [Pick::Even, Pick::Maglev(Maglev::new(&[], &[]).into()), Pick::LeastLoaded(None)] {
        assert_eq!(pick.choose(&[], u64::MAX, NO_LOADS), None);
    }
}

/// A connection through the flow table, which counts it.
fn open(flows: &OwnedFlows, n: u32, backend: &Backend) -> crate::flow::Flow {
    let table = flows.table();
    let client = Addr::from_v4((0x0a20_0000 + n).to_be_bytes());
    let original = Tuple { src: client, dst: Addr::from_v4([10, 96, 0, 10]), src_port: 4_000, dst_port: 80, protocol: protocol::TCP };
    let reply = Tuple { src: backend.addr, src_port: backend.port, dst: client, dst_port: 4_000, protocol: protocol::TCP };
    let load = table.loads().slot(backend.addr, backend.port);
    let new = NewFlow { original, reply, kind: Kind::Service, opener: Opener::Pod, service: 7, load };
    // Many workers' cursors, so that no half-open flow has to make room within one's reach.
    table.insert(&new, WorkerId(0), Now(0), &mut table.cursor(WorkerId((n % 64) as u16), 64)).unwrap()
}

#[test]
fn loads_count_the_live_flows_of_each_backend_through_ends_and_a_restart() {
    let flows = OwnedFlows::new(1_024, [1, 2]);
    let endpoints = endpoints(3);
    let opened: Vec<_> = (0..60).map(|n| open(&flows, n, &endpoints[(n % 3) as usize])).collect();
    let uncounted = NewFlow {
        original: opened[0].original.reversed(),
        reply: Tuple { dst_port: 9, ..opened[0].reply },
        kind: Kind::Service,
        opener: Opener::Pod,
        service: 8,
        load: LoadSlot::NONE,
    };
    flows.table().insert(&uncounted, WorkerId(0), Now(0), &mut Cursor::default()).unwrap();
    let loads = || endpoints.iter().map(|endpoint| flows.table().loads().of(endpoint)).collect::<Vec<_>>();
    assert_eq!(loads(), [20, 20, 20]);
    assert!(flows.table().end(opened[1].at));
    assert!(!flows.table().end(opened[1].at), "ended once");
    assert_eq!(flows.table().end_matching(|flow| flow.reply.src == endpoints[2].addr), 20);
    assert_eq!(loads(), [20, 19, 0]);
    flows.table().loads().begin(LoadSlot(1));
    flows.table().recover();
    assert_eq!(loads(), [20, 19, 0], "a successor counts what lives");
}

#[test]
fn the_less_loaded_of_two_is_chosen_so_that_long_connections_are_nearly_level() {
    const FLOWS: u32 = 2_000;
    let endpoints = endpoints(20);
    let spread = |pick: &Pick| {
        let flows = OwnedFlows::new(4_096, [1, 2]);
        for n in 0..FLOWS {
            let chosen = *pick.choose(&endpoints, finalize(n.into()), flows.table().loads()).unwrap();
            open(&flows, n, &chosen);
        }
        let loads: Vec<u64> = endpoints.iter().map(|endpoint| flows.table().loads().of(endpoint)).collect();
        assert_eq!(loads.iter().sum::<u64>(), u64::from(FLOWS), "no two of these share a counter");
        (*loads.iter().min().unwrap(), *loads.iter().max().unwrap())
    };
    let (least, most) = spread(&Pick::LeastLoaded(None));
    assert!(most - least <= 6, "{least} to {most} where 100 is even");
    let (least, most) = spread(&Pick::Even);
    assert!(most - least > 20, "by chance alone {least} to {most}: the test shows nothing");
}

#[test]
fn twice_the_weight_takes_twice_the_flows_when_the_least_loaded_is_chosen() {
    let endpoints = endpoints(4);
    let weights = Weights::new(&[1, 2, 2, 1]).unwrap();
    let pick = Pick::LeastLoaded(Some(weights.into()));
    let flows = OwnedFlows::new(4_096, [1, 2]);
    for n in 0..1_200 {
        let chosen = *pick.choose(&endpoints, finalize(n.into()), flows.table().loads()).unwrap();
        open(&flows, n, &chosen);
    }
    let loads: Vec<u64> = endpoints.iter().map(|endpoint| flows.table().loads().of(endpoint)).collect();
    for (load, expected) in loads.iter().zip([200u64, 400, 400, 200]) {
        assert!(load.abs_diff(expected) <= 10, "{loads:?}");
    }
}
