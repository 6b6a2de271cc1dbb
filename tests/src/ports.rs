//! Ports for servers of tests.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;

/// Ports are taken and given back before the server takes them; another process may be quicker.
pub(crate) const PORT_TRIES: usize = 5;

/// Below the ephemeral ports, so that no client's connection takes the port of a killed server before the server comes back.
const PORTS: Range<u16> = 10_000..32_000;

/// Ports that no process used a moment ago, all different.
pub(crate) fn free_ports(count: usize) -> Vec<u16> {
    let mut listeners = Vec::with_capacity(count);
    while listeners.len() < count {
        let chance = RandomState::new().build_hasher().finish() % u64::from(PORTS.end - PORTS.start);
        let port = PORTS.start + u16::try_from(chance).expect("less than there are ports");
        listeners.extend(TcpListener::bind((Ipv4Addr::LOCALHOST, port)));
    }
    listeners.iter().map(|listener| listener.local_addr().expect("bound").port()).collect()
}
