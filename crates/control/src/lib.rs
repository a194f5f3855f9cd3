//! The control plane: REST over a database, and the hosts it steers.
