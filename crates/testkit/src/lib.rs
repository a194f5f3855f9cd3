//! Real parts for tests: PostgreSQL, capsules, SDK runners, and the fake agent.
