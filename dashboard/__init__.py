"""The dashboard: a Streamlit app that reads the store and asks the daemon. Imports `store` and nothing else of ours."""
