//! Capsule networks: slots, namespaces, veth pairs, taps and the firewall.
