"""The entry of the dashboard: `streamlit run dashboard/app.py`, with the data folder in TUNER_DATA_DIR."""

import streamlit as st

from dashboard import page
from dashboard.words import escaped

st.set_page_config(page_title="Tuner", page_icon="🎛️", layout="wide")

pages = [
    st.Page("views/overview.py", title="Overview", icon=":material/monitor_heart:", default=True),
    st.Page("views/history.py", title="History", icon=":material/timeline:"),
    st.Page("views/experiments.py", title="Experiments", icon=":material/science:"),
    st.Page("views/recommendations.py", title="Recommendations", icon=":material/approval:"),
]
chosen = st.navigation(pages, position="top")
chosen.run()
st.caption(
    f"Data folder {escaped(page.data_dir())}. Times are local ({escaped(page.zone())}); tooltips give UTC."
)
