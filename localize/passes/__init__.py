"""Plan -> Plan (and Trunk -> Trunk): passes that every method shares."""
