//! The watchdog against real ZooKeeper servers. `tests/run` installs them; where it cannot, it leaves out what is below `with_zookeeper`.

mod with_zookeeper {
    mod child;
    mod crew;
    mod fleet;
    mod foreign_client;
    mod master;
    mod mover;
    mod place;
    mod session;
}
