"""Studies: trained models and measurements that answer one question each, and take minutes to hours."""
