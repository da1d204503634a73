"""The cluster around the task: identities, mutual TLS, a guarded GCS, admission.

Ray's token is one secret that every worker has, and its TLS takes any
certificate of the CA for anything. In a raysandbox cluster each component has
an identity with a role, and a guard (Envoy) in front of the GCS decides by
identity, method and content.

::

    errors      ClusterError: what can't be done, where, and the remedy
    settings    cluster.toml, inventory.toml, and the files of a cluster directory
    inventory   changes of inventory.toml that keep its comments
    pki         issuers, leaf and worker certificates, requests, lists, checks
    registry    what was issued, to whom, and what is revoked
    pending     keys made at the member, certificates that come back for them
    rolling     the script that renews a cluster member by member
    methods     which role may call which method of the GCS
    guard       settings -> Envoy's bootstrap, listeners and clusters (pure)
    shapes      identifiers of a request that the GCS would abort on (pure)
    access      identity + request + what is known -> allowed or why not (pure)
    budget      what a caller may still ask: buckets that can go into debt (pure)
    journal     what the access service knows, for the next start
    audit       hash-chained log, its rotation, anchors, queries and verification
    metrics     counters as a Prometheus page; alerts.yml has rules for it
    watch       nodes in the GCS that did not pass the guard
    supervisor  runs guard, access service, audit and watcher; restarts them
    surfaces    what listens on this machine, and what is open
    start       `ray start` with all of it
    running     which processes a member started, and how to end them
    report      what a running member says of itself, for status and doctor
"""
